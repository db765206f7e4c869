"""Who waits, who runs, what is finished? Neither HTTP nor torch."""
