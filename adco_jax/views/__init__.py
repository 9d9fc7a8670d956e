"""What the encoders are shown: boxes on the host, colours on the device."""
