"""Private names of other libraries: one module a library, one function a name; nothing else may use them.

A library may move these at any release. `tests/test_private_names.py` tries each function against the installed version
and names the one that moved. Modules import their library where a function runs.
"""
