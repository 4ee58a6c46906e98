-- Which releases may run on these tables: those of this level or a later one. An additive migration leaves the row as
-- it is; one that an older release could not bear raises the level and names the first release that has it.
CREATE TABLE schema_level (
    one     INTEGER PRIMARY KEY DEFAULT 1 CHECK (one = 1),
    level   INTEGER NOT NULL,
    release TEXT    NOT NULL
);
INSERT INTO schema_level (level, release) VALUES (1, '0.1.0');
