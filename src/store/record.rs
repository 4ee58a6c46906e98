//! Rows of SQL as structs, by column name. A macro of ours, because the derive macro of sqlx compiles both databases a
//! second time, for the compiler's own use.

/// A struct whose fields are the columns of a row, of either database.
macro_rules! record {
    ($(#[$meta:meta])* $visible:vis struct $name:ident { $($(#[$doc:meta])* $field:ident: $kind:ty),* $(,)? }) => {
        $(#[$meta])*
        $visible struct $name {
            $($(#[$doc])* $field: $kind),*
        }

        impl<'r, R: sqlx::Row> sqlx::FromRow<'r, R> for $name
        where
            &'static str: sqlx::ColumnIndex<R>,
            $($kind: sqlx::Decode<'r, R::Database> + sqlx::Type<R::Database>),*
        {
            fn from_row(row: &'r R) -> Result<Self, sqlx::Error> {
                Ok(Self { $($field: row.try_get(stringify!($field))?),* })
            }
        }
    };
}

pub(super) use record;
