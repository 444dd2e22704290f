"""`diffitm selfbench` as a file, which `ray job submit` takes; see --help."""

from diffitm.cli import start

if __name__ == "__main__":
    start("selfbench")
