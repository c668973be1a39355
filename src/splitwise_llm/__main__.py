"""`python -m splitwise_llm` is `splitwise`."""

from splitwise_llm.cli import main

if __name__ == "__main__":
    main()
