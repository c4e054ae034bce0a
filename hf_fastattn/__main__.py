"""`python -m hf_fastattn` is the `hf-fastattn` command."""

from hf_fastattn.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
