-- Hosts, accounts, banned domains, and how far the log has been applied.

CREATE TABLE hosts (
    id             INTEGER PRIMARY KEY AUTOINCREMENT,
    hostname       TEXT    NOT NULL UNIQUE,           -- host or host:port, lower case
    tls            BOOLEAN NOT NULL,
    status         TEXT    NOT NULL DEFAULT 'active', -- active, idle, offline, throttled, banned
    last_seq       INTEGER,                           -- the host's cursor
    account_limit  INTEGER NOT NULL,
    account_count  INTEGER NOT NULL DEFAULT 0,
    trusted        BOOLEAN NOT NULL,
    validation     TEXT,                              -- strict, ratchet, lenient; NULL: the general one
    sync11         BOOLEAN NOT NULL DEFAULT FALSE,    -- once sent a sync 1.1 commit
    max_per_second INTEGER,
    max_per_hour   INTEGER,
    max_per_day    INTEGER,
    created_at     INTEGER NOT NULL                   -- seconds since 1970
);

CREATE TABLE accounts (
    uid             INTEGER PRIMARY KEY AUTOINCREMENT,
    rev             INTEGER,                          -- the rev as 64-bit TID
    resolved_at     INTEGER,                          -- seconds since 1970
    host_id         INTEGER NOT NULL,
    local_status    INTEGER NOT NULL DEFAULT 0,       -- 0 active, 1 takendown, 2 throttled, 3 suspended, 4 desynchronized
    desynchronized  BOOLEAN NOT NULL DEFAULT FALSE,
    did             TEXT    NOT NULL UNIQUE,
    upstream_status TEXT,                             -- NULL: active
    data_cid        BLOB,
    commit_cid      BLOB,
    signing_key     BLOB                              -- curve, then the compressed point
);

CREATE INDEX accounts_throttled ON accounts (host_id, uid) WHERE local_status = 2;
CREATE INDEX accounts_taken_down ON accounts (uid) WHERE local_status = 1;

CREATE TABLE domain_bans (
    domain     TEXT    PRIMARY KEY,
    created_at INTEGER NOT NULL
) WITHOUT ROWID;

-- One row: the log must be read from this sequence number on to bring these tables up to date.
CREATE TABLE log_position (
    one         INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1),
    replay_from INTEGER NOT NULL
);
INSERT INTO log_position (replay_from) VALUES (1);
