"""The same program as ``lightning-moe``, for a checkout that is not installed."""

from lightning_moe.cli.main import main

if __name__ == "__main__":
    main()
