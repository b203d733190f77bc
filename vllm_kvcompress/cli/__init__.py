"""The command ``kvcompress``: one file per command."""
