"""Faults of one of two tensor-parallel ranks, in a server on this machine: lab/rank_faults.py."""

from lab.rank_faults import main

if __name__ == "__main__":
    main()
