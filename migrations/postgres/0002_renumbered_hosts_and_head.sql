-- Where a host began to number its events anew: its cursor then, and the first log sequence number of what it sent since.
ALTER TABLE hosts ADD COLUMN renumbered_cursor BIGINT;
ALTER TABLE hosts ADD COLUMN renumbered_from BIGINT;

-- The last log sequence number that was given out, as far as it is known here: a log that ends before it has lost its end.
ALTER TABLE log_position ADD COLUMN head BIGINT NOT NULL DEFAULT 0;
