-- Which releases may run on these tables: those of this level or a later one. An additive migration leaves the row as
-- it is; one that an older release could not bear raises the level and names the first release that has it.
CREATE TABLE schema_level (
    one     BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
    level   INTEGER NOT NULL,
    release TEXT    NOT NULL
);
INSERT INTO schema_level (level, release) VALUES (1, '0.1.0');

-- Counts the relays that took this database. A relay writes only while the epoch is the one that it took.
CREATE TABLE relay_epoch (
    one   BOOLEAN PRIMARY KEY DEFAULT TRUE CHECK (one),
    epoch BIGINT  NOT NULL
);
INSERT INTO relay_epoch (epoch) VALUES (0);

-- Names compare by their bytes: the order of a libc locale changes with the C library, which leaves wrong unique
-- indexes behind, and compares slower.
--
-- Cost: the tables stay as they are, their indexes on these columns are built anew under an exclusive lock, before the
-- relay serves anybody. Measured with PostgreSQL 15 on two cores: 1.1 s for a million accounts, so about a minute for
-- 40 million, with free space for a second copy of the index (2.3 GB) meanwhile.
ALTER TABLE accounts ALTER COLUMN did TYPE TEXT COLLATE "C";
ALTER TABLE hosts ALTER COLUMN hostname TYPE TEXT COLLATE "C";
ALTER TABLE domain_bans ALTER COLUMN domain TYPE TEXT COLLATE "C";
