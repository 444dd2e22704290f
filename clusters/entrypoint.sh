#!/bin/sh
# entrypoint.sh COMMAND..: runs a pipeline for a scheduler that pays for another try after any code but 0.
# Bad input (2) and unusable parts of it (3) would end like that again: they are said and become 0. Every
# other code stays, so that a lost node (137), an interruption (130), an object store or a Hub that is away
# (75) and bugs (1) are tried again. docs/operations.md has the table.
trap : INT TERM # the command is sent these, too; this shell waits for its code
"$@"
code=$?
case $code in
2) what="bad input, NOTHING OR NOT ALL IS DONE: the message above says what to change" ;;
3) what="finished, but some of the input could not be used: the message above names the list" ;;
*) exit $code ;;
esac
echo "entrypoint.sh: exit code $code, not tried again ($what)" >&2
