-- Whether an account counts against the quota of its host: only what its own PDS has said of it counts, and nothing of
-- a deleted account. The previous release counts every account that it creates, as the default says.
ALTER TABLE accounts ADD COLUMN counted BOOLEAN NOT NULL DEFAULT TRUE;

-- The log sequence number of what the upstream status is from: an older event that is replayed changes nothing.
ALTER TABLE accounts ADD COLUMN status_seq BIGINT;

-- Cost: one pass over the accounts, before the relay serves anybody.
UPDATE hosts SET account_count = account_count - deleted.accounts
    FROM (SELECT host_id, COUNT(*) AS accounts FROM accounts WHERE upstream_status = 'deleted' GROUP BY host_id) AS deleted
    WHERE deleted.host_id = hosts.id;
UPDATE accounts SET counted = FALSE WHERE upstream_status = 'deleted';
