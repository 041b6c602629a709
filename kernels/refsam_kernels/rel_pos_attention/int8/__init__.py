"""`rel_pos_attention` with products of queries and keys in 8-bit integers, for inference; see the README beside."""
