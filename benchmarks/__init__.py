"""What is measured, one file per question; each prints a Markdown table and is run with `python -m`."""
