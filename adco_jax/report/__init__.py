"""A workdir as one page, an export's card, and the curves and pages they are made of."""
