"""Programs that measure; nothing here is asserted by tests."""
