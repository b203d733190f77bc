"""Host time of layer groups.

lab/host_time.py says more; --help lists the options.
"""

from lab.host_time import main

if __name__ == "__main__":
    main()
