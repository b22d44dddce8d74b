"""`python -m xandrouting` is the command `xandrouting`."""

from xandrouting.cli.main import app

if __name__ == "__main__":
    app(prog_name="xandrouting")
