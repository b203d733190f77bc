"""Train the probe model of examples/.

lab/probe_model/command.py says more; --help lists the options.
"""

from lab.probe_model.command import main

if __name__ == "__main__":
    main()
