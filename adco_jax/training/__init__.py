"""One update of both players, and all that a run around it needs: state, optimisers, programs, log, saving."""
