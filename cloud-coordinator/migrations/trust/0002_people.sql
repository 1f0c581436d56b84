-- Who may come in: people with a password, and what they (and programs) show instead of it.
CREATE TABLE users (
    id         INTEGER NOT NULL PRIMARY KEY,
    name       TEXT    NOT NULL UNIQUE,
    role       TEXT    NOT NULL CHECK (role IN ('viewer', 'labeller', 'operator', 'admin')),
    site       TEXT,                 -- NULL: all sites; an admin is for all sites
    password   TEXT    NOT NULL,     -- argon2id, in PHC form
    disabled   INTEGER NOT NULL DEFAULT 0,
    created_ms INTEGER NOT NULL
) STRICT;

-- What was signed and is not yet taken back. A signed token without its row here is worth nothing.
CREATE TABLE grants (
    jti        TEXT    NOT NULL PRIMARY KEY,
    kind       TEXT    NOT NULL CHECK (kind IN ('session', 'token', 'machine', 'setup')),
    owner      INTEGER REFERENCES users (id), -- NULL: this machine
    label      TEXT    NOT NULL,              -- what it is for, in its owner's words
    role       TEXT,                          -- of a token; a session has its owner's
    site       TEXT,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER NOT NULL,
    seen_ms    INTEGER NOT NULL               -- to the minute
) STRICT;
CREATE INDEX grants_by_owner ON grants (owner, kind);
