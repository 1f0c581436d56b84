-- Who may enrol a device, which devices have, and who may listen on the broker.

CREATE TABLE enrolment_tokens (
    jti TEXT PRIMARY KEY,
    site TEXT NOT NULL,
    device TEXT,                     -- only this one; any name if not given
    quota INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0 CHECK (used <= quota),
    needs_approval INTEGER NOT NULL,
    revoked INTEGER NOT NULL DEFAULT 0,
    made_ms INTEGER NOT NULL,
    made_by TEXT NOT NULL,
    expires_ms INTEGER NOT NULL
) STRICT;

-- A key is one device's for ever: a revoked one stays here, so that it never gets in again.
CREATE TABLE identities (
    key BLOB PRIMARY KEY CHECK (length(key) = 32), -- SHA-256 of the public key
    site TEXT NOT NULL,
    device TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'active', 'revoked')),
    serial TEXT,                     -- of the last certificate
    not_after_ms INTEGER,            -- of the last certificate
    enrolled_ms INTEGER NOT NULL,
    token TEXT NOT NULL              -- with which it came
) STRICT;
CREATE UNIQUE INDEX identities_by_name ON identities (site, device) WHERE state <> 'revoked';
CREATE INDEX identities_by_site ON identities (site, device, enrolled_ms);

CREATE TABLE subscribers (
    name TEXT PRIMARY KEY,
    password TEXT NOT NULL,          -- argon2id
    sites TEXT,                      -- JSON list; all if not given
    made_ms INTEGER NOT NULL,
    made_by TEXT NOT NULL
) STRICT;
