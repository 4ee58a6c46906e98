-- Hosts, accounts, banned domains, and how far the log has been applied.

CREATE TABLE hosts (
    id             INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    hostname       TEXT    NOT NULL UNIQUE,           -- host or host:port, lower case
    tls            BOOLEAN NOT NULL,
    status         TEXT    NOT NULL DEFAULT 'active', -- active, idle, offline, throttled, banned
    last_seq       BIGINT,                            -- the host's cursor
    account_limit  BIGINT  NOT NULL,
    account_count  BIGINT  NOT NULL DEFAULT 0,
    trusted        BOOLEAN NOT NULL,
    validation     TEXT,                              -- strict, ratchet, lenient; NULL: the general one
    sync11         BOOLEAN NOT NULL DEFAULT FALSE,    -- once sent a sync 1.1 commit
    max_per_second BIGINT,
    max_per_hour   BIGINT,
    max_per_day    BIGINT,
    created_at     BIGINT  NOT NULL                   -- seconds since 1970
);

-- No foreign key to hosts: hosts are never deleted, and the check would cost every inserted row.
-- The fill factor leaves room for updates in place: no indexed column changes with a commit.
CREATE TABLE accounts (
    uid             BIGINT   GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    rev             BIGINT,                           -- the rev as 64-bit TID
    resolved_at     BIGINT,                           -- seconds since 1970
    host_id         INTEGER  NOT NULL,
    local_status    SMALLINT NOT NULL DEFAULT 0,      -- 0 active, 1 takendown, 2 throttled, 3 suspended, 4 desynchronized
    desynchronized  BOOLEAN  NOT NULL DEFAULT FALSE,
    did             TEXT     NOT NULL UNIQUE,
    upstream_status TEXT,                             -- NULL: active
    data_cid        BYTEA,
    commit_cid      BYTEA,
    signing_key     BYTEA                             -- curve, then the compressed point
) WITH (fillfactor = 80);

CREATE INDEX accounts_throttled ON accounts (host_id, uid) WHERE local_status = 2;
CREATE INDEX accounts_taken_down ON accounts (uid) WHERE local_status = 1;

CREATE TABLE domain_bans (
    domain     TEXT   PRIMARY KEY,
    created_at BIGINT NOT NULL
);

-- One row: the log must be read from this sequence number on to bring these tables up to date.
CREATE TABLE log_position (
    one         BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
    replay_from BIGINT  NOT NULL
);
INSERT INTO log_position (replay_from) VALUES (1);
