"""`python -m lit_llm VERB`."""

from lit_llm.cli import main

if __name__ == "__main__":
    main()
