"""Published weights in 8 or 4 bits: what a config says of them, and their numbers in float32."""
