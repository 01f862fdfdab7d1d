"""Stores of other projects behind kvlab's `Store` contract, for comparisons: `kvlab bench stores`.

Thin adapters: each says in `CANNOT` which clauses of the contract its store does not keep. None of them is for use in
production. The packages are optional, and imported when an adapter is created.
"""
