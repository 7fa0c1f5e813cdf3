"""What keeps a long run alive and honest: hangs, stragglers, signals, start-up checks, bad steps, drifting replicas."""
