"""What everything else stands on, and what imports torch only: layouts, shards, collectives, agreement, overrides."""
