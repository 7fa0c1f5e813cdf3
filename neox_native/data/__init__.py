"""From text on disk to the token rows that step N must see."""
