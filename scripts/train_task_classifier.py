"""Train and judge WindowKV's task classifier.

lab/classifier/training.py says more; --help lists the options.
"""

from lab.classifier.training import main

if __name__ == "__main__":
    main()
