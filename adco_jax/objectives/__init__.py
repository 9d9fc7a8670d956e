"""The second players: what an encoder is trained against."""
