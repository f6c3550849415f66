"""Tile configurations, the choice of plan, and the gate that compiles every configuration without a GPU."""
