"""What an encoder is trained against: the interface, the loss over a split bank, AdCo and MoCo."""
