"""What upstream's command `transcriptformer` runs, as a module. It needs upstream's environment."""

from transcriptformer.cli import main

if __name__ == "__main__":
    main()
