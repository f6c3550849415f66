"""The similarity itself: all pairs, matched pairs, the fold; its operators, and its form in plain torch."""
