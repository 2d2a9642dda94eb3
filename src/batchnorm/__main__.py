"""`python -m batchnorm` is the `batchnorm` command."""

from .cli import app

if __name__ == "__main__":
    app()
