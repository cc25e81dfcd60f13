"""`python -m serve.cli`: the command without its script, as the demo starts its server."""

from serve.cli.app import main

if __name__ == "__main__":
    main()
