"""A pack of its own folder, whose nodes sample, paste and detect as Impact Pack's and Ultimate SD Upscale's do."""
