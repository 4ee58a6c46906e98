-- Views of the event log. Each follows the log from its position: the first sequence number that it has not applied.
-- The position of the accounts was in log_position alone. That row is kept up to date for the previous release, which
-- moves it without this table: the higher one of both holds.
CREATE TABLE views (
    name     TEXT   PRIMARY KEY,
    position BIGINT NOT NULL
);
INSERT INTO views (name, position) SELECT 'accounts', replay_from FROM log_position;
