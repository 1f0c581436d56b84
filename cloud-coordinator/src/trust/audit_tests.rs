//! What is done to the log is found.

use super::*;

async fn written(dir: &tempfile::TempDir, lines: i64) -> Records {
    let records = Records::trust(dir.path()).await.unwrap();
    let mut writer = records.writer().await;
    let mut tx = writer.begin().await.unwrap();
    for n in 1..=lines {
        let (who, object) = (format!("user u{n}"), format!("thing {n}"));
        let entry = Entry {
            who: &who,
            action: "POST /x",
            object: &object,
            outcome: Outcome::Done,
            detail: "",
        };
        append(&mut tx, entry, n).await.unwrap();
    }
    commit(tx).await.unwrap();
    drop(writer);
    records
}

async fn sql(records: &Records, statement: &'static str) {
    let mut writer = records.writer().await;
    let mut tx = writer.begin().await.unwrap();
    sqlx::raw_sql(statement).execute(&mut *tx).await.unwrap();
    commit(tx).await.unwrap();
}

#[tokio::test]
async fn whatever_is_done_to_a_line_is_found() {
    for (statement, expected) in [
        (
            "UPDATE audit SET who = 'user u9' WHERE seq = 5",
            Broken::Hash(5),
        ),
        (
            "UPDATE audit SET action = 'GET /x' WHERE seq = 1",
            Broken::Hash(1),
        ),
        (
            "UPDATE audit SET object = 'thing 6' WHERE seq = 5",
            Broken::Hash(5),
        ),
        (
            "UPDATE audit SET outcome = 'refused' WHERE seq = 9",
            Broken::Hash(9),
        ),
        (
            "UPDATE audit SET detail = 'x' WHERE seq = 5",
            Broken::Hash(5),
        ),
        ("UPDATE audit SET at_ms = 6 WHERE seq = 5", Broken::Hash(5)),
        (
            "UPDATE audit SET hash = zeroblob(32) WHERE seq = 5",
            Broken::Hash(5),
        ),
        // Text that moves from one field to the next has another length in each.
        (
            "UPDATE audit SET who = 'user u5P', action = 'OST /x' WHERE seq = 5",
            Broken::Hash(5),
        ),
        (
            "DELETE FROM audit WHERE seq = 5",
            Broken::Order {
                expected: 5,
                found: 6,
            },
        ),
        (
            "DELETE FROM audit WHERE seq = 1",
            Broken::Order {
                expected: 1,
                found: 2,
            },
        ),
        // Removed, and the others moved up.
        (
            "DELETE FROM audit WHERE seq = 5; UPDATE audit SET seq = -seq WHERE seq > 5; \
             UPDATE audit SET seq = -seq - 1 WHERE seq < 0",
            Broken::Hash(5),
        ),
        // Two change places.
        (
            "UPDATE audit SET seq = 100 WHERE seq = 5; UPDATE audit SET seq = 5 WHERE seq = 6; \
             UPDATE audit SET seq = 6 WHERE seq = 100",
            Broken::Hash(5),
        ),
        // One is put in between, with a copy of what stands there.
        (
            "UPDATE audit SET seq = -seq WHERE seq > 5; UPDATE audit SET seq = 1 - seq WHERE seq < 0; \
             INSERT INTO audit SELECT 6, at_ms, who, action, object, outcome, detail, hash FROM audit WHERE seq = 5",
            Broken::Hash(6),
        ),
        (
            "INSERT INTO audit SELECT 0, at_ms, who, action, object, outcome, detail, hash FROM audit WHERE seq = 5",
            Broken::Order {
                expected: 1,
                found: 0,
            },
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let records = written(&dir, 9).await;
        let whole = verify(&records, None).await.unwrap().unwrap();
        assert_eq!(whole, head(&records).await.unwrap());
        assert_eq!(whole.to_string().parse::<Head>().unwrap(), whole);
        sql(&records, statement).await;
        assert_eq!(
            verify(&records, None).await.unwrap(),
            Err(expected),
            "{statement}"
        );
    }
}

#[tokio::test]
async fn who_remembers_a_head_sees_that_the_end_is_cut_off_or_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let records = written(&dir, 9).await;
    let remembered = verify(&records, None).await.unwrap().unwrap();
    sql(&records, "DELETE FROM audit WHERE seq > 7").await;
    // By itself it looks whole.
    assert_eq!(verify(&records, None).await.unwrap().unwrap().seq, 7);
    let cut = verify(&records, Some(&remembered)).await.unwrap();
    assert_eq!(cut, Err(Broken::Short { was: 9, is: 7 }));
    // Others in their place: as many lines, and a chain that holds.
    for n in 0..3 {
        let entry = Entry {
            who: "user eve",
            action: "POST /x",
            object: "",
            outcome: Outcome::Done,
            detail: "",
        };
        note(&records, entry, n).await.unwrap();
    }
    assert_eq!(verify(&records, None).await.unwrap().unwrap().seq, 10);
    let anew = verify(&records, Some(&remembered)).await.unwrap();
    assert_eq!(anew, Err(Broken::Head(9)));
    assert!("9:xyz".parse::<Head>().is_err());
}

#[tokio::test]
async fn pages_and_bounds() {
    let dir = tempfile::tempdir().unwrap();
    let records = written(&dir, 2_500).await;
    assert_eq!(verify(&records, None).await.unwrap().unwrap().seq, 2_500);
    let first = page(&records, None, 100).await.unwrap();
    assert_eq!(
        (first.len(), first[0].seq, first[99].seq),
        (100, 2_500, 2_401)
    );
    let next = page(&records, Some(2_401), 100).await.unwrap();
    assert_eq!((next[0].seq, next[99].seq), (2_400, 2_301));
    let long = "ä".repeat(5_000);
    let entry = Entry {
        who: &long,
        action: &long,
        object: &long,
        outcome: Outcome::Refused,
        detail: &long,
    };
    note(&records, entry, 0).await.unwrap();
    let row = &page(&records, None, 1).await.unwrap()[0];
    let lengths = [&row.who, &row.action, &row.object, &row.detail].map(String::len);
    assert_eq!(lengths, [MAX_SHORT, MAX_SHORT, MAX_OBJECT, MAX_DETAIL]);
    assert!(verify(&records, None).await.unwrap().is_ok());
}
