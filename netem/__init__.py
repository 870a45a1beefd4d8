"""Links of a wireless cell: the hosts at their ends, and what happens to a packet between them."""
