"""What a program could cost by arithmetic, and what a compiled one sends."""
