#!/bin/sh
# submit.sh ID COMMAND..: this checkout as a job on the cluster at the other end of `ray dashboard`, with the
# token of ~/.ray/auth_token. Ray leaves .git out, so the commit goes along as the job's metadata.
set -eu
cd "$(dirname "$0")/.."
id=${1:?usage: clusters/submit.sh ID COMMAND..}
shift
commit=$(git describe --always --dirty --abbrev=40 --exclude='*')
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
exec ray job submit --address "${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}" --submission-id "$id" \
    --runtime-env runtime_env.yaml --working-dir . --metadata-json "{\"commit\": \"$commit\"}" -- "$@"
