"""Before a GPU-hour is spent: what a layout needs, how fast it will be, and which one to take."""
