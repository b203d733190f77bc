"""Input that nobody should send, and what watches while it is read.

`values` makes up per-request options, `yaml_files` files for ``--kv-compression``, `audit` sees who
opens, imports or runs anything meanwhile; all three are used by tests. `fuzz` sends what
schemathesis makes of a server's OpenAPI document: ``scripts/bad_input.py``.
"""
