-- Bytes that a host may send in an hour, where an operator set that for it.
ALTER TABLE hosts ADD COLUMN max_bytes_per_hour BIGINT;
