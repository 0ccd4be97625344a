"""`python -m mdmrl ...`, and `accelerate launch -m mdmrl ...`."""

from mdmrl.cli import main

main()
