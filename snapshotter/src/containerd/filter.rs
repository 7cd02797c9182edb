//! Containerd's filter language (`pkg/filters`), as `List` receives it:
//!
//! ```text
//! filters   := selectors *            any of the strings must match; none at all matches everything
//! selectors := selector ("," selector)*                                        all must match
//! selector  := fieldpath (operator value)?                      without operator: it is there
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="                                       ~= regular expression
//! value     := quoted | [^\s,]+
//! quoted    := Go string in "…"; after ~= also in /…/ or |…|
//! ```
//!
//! Fields of a snapshot: `kind`, `name`, `parent`, `labels.KEY`. Two differences to containerd: a bad regular expression is
//! an error here (there it matches nothing), and a quoted text must be UTF-8.

use std::iter::Peekable;
use std::str::CharIndices;

use regex::{Regex, RegexBuilder};

use crate::snapshots::Snapshot;

/// Most filters in one request, and most bytes in each. Chosen: containerd's own have one or two selectors, a label at most
/// 4096 bytes.
const FILTERS_MAX: usize = 64;
const FILTER_BYTES_MAX: usize = 16 << 10;

/// Memory of one compiled regular expression.
const REGEX_BYTES_MAX: usize = 1 << 20;

/// Some filters, any of which must match.
#[derive(Debug, Clone)]
pub struct Filter {
    any: Vec<Vec<Selector>>,
}

/// Why a filter is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// It does not follow the grammar.
    #[error("filter {filter:?} at byte {position}: {reason}")]
    Syntax {
        /// The filter.
        filter: String,
        /// Where in it.
        position: usize,
        /// What is wrong there.
        reason: String,
    },
    /// Its regular expression does not compile.
    #[error("filter {filter:?}: {reason}")]
    Regex {
        /// The filter.
        filter: String,
        /// What is wrong.
        reason: String,
    },
    /// There is too much of it.
    #[error("more than {FILTERS_MAX} filters, or one of more than {FILTER_BYTES_MAX} bytes")]
    TooLarge,
}

impl Filter {
    /// Parses the filters of one request.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, FilterError> {
        if filters.len() > FILTERS_MAX || filters.iter().any(|filter| filter.as_ref().len() > FILTER_BYTES_MAX) {
            return Err(FilterError::TooLarge);
        }
        let any = filters.iter().map(|filter| Parser::new(filter.as_ref()).selectors()).collect::<Result<_, _>>()?;
        Ok(Self { any })
    }

    /// Whether `snapshot` matches.
    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        self.any.is_empty() || self.any.iter().any(|all| all.iter().all(|selector| selector.matches(snapshot)))
    }
}

#[derive(Debug, Clone)]
struct Selector {
    field: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let value = self.value(snapshot);
        // An absent field compares as an empty one, except for equality.
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::NotEqual(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(regex) => regex.is_match(value.unwrap_or_default()),
        }
    }

    fn value<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a str> {
        let (first, rest) = self.field.split_first()?;
        match first.as_str() {
            "kind" => Some(snapshot.record.kind.word()),
            "name" => Some(&snapshot.name),
            "parent" => Some(snapshot.record.parent.as_deref().unwrap_or_default()),
            "labels" => snapshot.record.labels.get(&rest.join(".")).map(String::as_str),
            _ => None,
        }
    }
}

struct Parser<'a> {
    filter: &'a str,
    rest: Peekable<CharIndices<'a>>,
}

impl<'a> Parser<'a> {
    fn new(filter: &'a str) -> Self {
        Self { filter, rest: filter.char_indices().peekable() }
    }

    /// The whole filter; an empty one matches everything.
    fn selectors(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = Vec::new();
        if self.filter.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => self.rest.next(),
                Some(other) => return Err(self.error(format!("unexpected {other:?}"))),
            };
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut field = vec![self.field()?];
        while self.peek() == Some('.') {
            self.rest.next();
            field.push(self.field()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { field, test: Test::Present });
        }
        let test = match self.operator()? {
            "==" => Test::Equal(self.value(false)?),
            "!=" => Test::NotEqual(self.value(false)?),
            "~=" => Test::Matches(self.regex()?),
            other => return Err(self.error(format!("unknown operator {other:?}"))),
        };
        Ok(Selector { field, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(first) if is_field(first) => Ok(self.take_while(is_field).to_owned()),
            _ => Err(self.error("expected a field name or a text in quotes".into())),
        }
    }

    fn operator(&mut self) -> Result<&'a str, FilterError> {
        self.skip_space();
        let operator = self.take_while(|next| matches!(next, '=' | '!' | '~'));
        if operator.is_empty() {
            return Err(self.error("expected an operator (== != ~=)".into()));
        }
        Ok(operator)
    }

    fn value(&mut self, other_quotes: bool) -> Result<String, FilterError> {
        self.skip_space();
        match self.peek() {
            Some('"') => self.quoted('"'),
            Some(quote @ ('/' | '|')) if other_quotes => self.quoted(quote),
            Some(quote @ ('/' | '|')) => Err(self.error(format!("{quote} quotes regular expressions only"))),
            // Containerd reads these as separators or operators wherever a value might begin.
            Some(first) if is_value(first) && !matches!(first, '.' | '=' | '!' | '~') => {
                Ok(self.take_while(is_value).to_owned())
            }
            _ => Err(self.error("expected a value or a text in quotes".into())),
        }
    }

    fn regex(&mut self) -> Result<Regex, FilterError> {
        let pattern = self.value(true)?;
        RegexBuilder::new(&pattern)
            .size_limit(REGEX_BYTES_MAX)
            .dfa_size_limit(REGEX_BYTES_MAX)
            .build()
            .map_err(|error| FilterError::Regex { filter: self.filter.to_owned(), reason: error.to_string() })
    }

    /// A Go string literal between `quote`s.
    fn quoted(&mut self, quote: char) -> Result<String, FilterError> {
        self.rest.next();
        let mut text = Vec::new();
        loop {
            match self.rest.next().map(|(_, next)| next) {
                Some(next) if next == quote => break,
                Some('\\') => self.escape(quote, &mut text)?,
                Some(next) if next != '\n' && next != '\0' => push(&mut text, next),
                _ => return Err(self.error("text in quotes does not end".into())),
            }
        }
        String::from_utf8(text).map_err(|_| self.error("text in quotes is not UTF-8".into()))
    }

    /// What follows a backslash.
    fn escape(&mut self, quote: char, text: &mut Vec<u8>) -> Result<(), FilterError> {
        let illegal = |parser: &mut Self| parser.error("illegal escape sequence".into());
        match self.rest.next().map(|(_, next)| next) {
            Some('a') => text.push(0x07),
            Some('b') => text.push(0x08),
            Some('f') => text.push(0x0c),
            Some('n') => text.push(b'\n'),
            Some('r') => text.push(b'\r'),
            Some('t') => text.push(b'\t'),
            Some('v') => text.push(0x0b),
            Some('\\') => text.push(b'\\'),
            Some(next) if next == quote => push(text, next),
            Some('x') => {
                let byte = self.digits(0, 16, 2)?;
                text.push(u8::try_from(byte).map_err(|_| illegal(self))?);
            }
            Some(kind @ ('u' | 'U')) => {
                let code = self.digits(0, 16, if kind == 'u' { 4 } else { 8 })?;
                push(text, char::from_u32(code).ok_or_else(|| illegal(self))?);
            }
            Some(first @ '0'..='7') => {
                let byte = self.digits(first.to_digit(8).unwrap_or(0), 8, 2)?;
                text.push(u8::try_from(byte).map_err(|_| illegal(self))?);
            }
            _ => return Err(illegal(self)),
        }
        Ok(())
    }

    /// `count` (at most 8) digits after `value`; never overflows, since `value` is 0 where eight hexadecimal digits follow.
    fn digits(&mut self, mut value: u32, base: u32, count: u32) -> Result<u32, FilterError> {
        for _ in 0..count {
            let digit = self.rest.next().and_then(|(_, next)| next.to_digit(base));
            let digit = digit.ok_or_else(|| self.error("illegal numeric escape sequence".into()))?;
            value = value.wrapping_mul(base).wrapping_add(digit);
        }
        Ok(value)
    }

    fn peek(&mut self) -> Option<char> {
        self.rest.peek().map(|&(_, next)| next)
    }

    fn position(&mut self) -> usize {
        self.rest.peek().map_or(self.filter.len(), |&(position, _)| position)
    }

    fn skip_space(&mut self) {
        while self.rest.next_if(|&(_, next)| next.is_whitespace()).is_some() {}
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &'a str {
        let start = self.position();
        while self.rest.next_if(|&(_, next)| wanted(next)).is_some() {}
        let end = self.position();
        self.filter.get(start..end).unwrap_or_default()
    }

    fn error(&mut self, reason: String) -> FilterError {
        FilterError::Syntax { filter: self.filter.to_owned(), position: self.position(), reason }
    }
}

fn is_field(next: char) -> bool {
    next == '_' || next.is_ascii_alphanumeric()
}

fn is_value(next: char) -> bool {
    next != ',' && !next.is_whitespace() && !next.is_control()
}

fn push(text: &mut Vec<u8>, next: char) {
    text.extend_from_slice(next.encode_utf8(&mut [0; 4]).as_bytes());
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;
    use crate::snapshots::{Backing, Kind, Labels, Record, Usage};

    fn snapshot(name: &str, parent: Option<&str>, labels: &[(&str, &str)]) -> Snapshot {
        Snapshot {
            name: name.into(),
            record: Record {
                id: 1,
                kind: Kind::Active,
                parent: parent.map(Into::into),
                labels: labels.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect::<Labels>(),
                created: UNIX_EPOCH,
                updated: UNIX_EPOCH,
                usage: Usage::default(),
                backing: Backing::Ordinary,
                declined: None,
                id_maps: None,
            },
        }
    }

    fn matches(filters: &[&str]) -> bool {
        let labels = [
            ("containerd.io/snapshot.ref", "sha256:abc"),
            ("l", "1"),
            ("a.b", "dotted"),
            ("quote", "say \"x\"\n"),
            ("empty", ""),
        ];
        Filter::parse(filters).expect("parses").matches(&snapshot("k8s.io/5/sha256:abc", Some("below"), &labels))
    }

    #[test]
    fn of_containerd_work() {
        assert!(matches(&[]));
        assert!(matches(&[""]));
        assert!(matches(&[r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent=="below""#]));
        assert!(matches(&[r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent==below"#]));
        assert!(!matches(&[r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent==other"#]));
        assert!(matches(&["name==k8s.io/5/sha256:abc"]));
        assert!(matches(&["name==x", "kind==active"]));
        assert!(!matches(&["name==x", "kind==view"]));
        assert!(matches(&["parent!=\"\",labels.l"]));
        assert!(!matches(&["labels.l,labels.m"]));
    }

    #[test]
    fn operators() {
        assert!(matches(&["labels.a.b==dotted"]));
        assert!(matches(&[r#"labels."a.b"==dotted"#]));
        assert!(matches(&[r#""labels"."a"."b"==dotted"#]));
        assert!(matches(&[r#"labels.quote=="say \"x\"\n""#]));
        assert!(matches(&["labels.l!=2"]));
        assert!(matches(&["labels.nothing!=2"]));
        assert!(!matches(&["labels.nothing!=\"\""]));
        assert!(!matches(&["labels.nothing==\"\""]));
        assert!(matches(&["labels.empty==\"\""]));
        assert!(matches(&["labels.empty"]));
        assert!(matches(&["name~=^k8s"]));
        assert!(matches(&["name~=/sha256:[a-c]+$/"]));
        assert!(matches(&[r"name~=|k8s\\.io/5|"]));
        assert!(!matches(&["name~=^x"]));
        assert!(!matches(&["unknown"]));
        assert!(!matches(&["labels"]));
        assert!(matches(&[" kind == active, name != x"]));
    }

    #[test]
    fn errors_say_where() {
        for (filter, position) in [
            ("name==", 6),
            ("name=", 5),
            ("name==a b", 7),
            ("name===a", 7),
            ("==a", 0),
            (",", 0),
            ("name==a,", 8),
            ("name==/a/", 6),
            ("name==\"a", 8),
            ("labels.==a", 7),
            (r#"name=="\q""#, 9),
            (r#"name=="\xff""#, 12),
            ("name\0", 4),
        ] {
            match Filter::parse(&[filter]) {
                Err(FilterError::Syntax { position: found, .. }) => assert_eq!(found, position, "{filter:?}"),
                other => panic!("{filter:?}: {other:?}"),
            }
        }
        assert!(matches!(Filter::parse(&["name~=("]), Err(FilterError::Regex { .. })));
        assert!(matches!(Filter::parse(&[r#"name~="(\\pL{100}){1000}""#]), Err(FilterError::Regex { .. })));
        assert!(matches!(Filter::parse(&["x".repeat(FILTER_BYTES_MAX + 1)]), Err(FilterError::TooLarge)));
        assert!(matches!(Filter::parse(&["x"; FILTERS_MAX + 1]), Err(FilterError::TooLarge)));
    }

    /// Quotes as Go's `strconv.Quote` does for text, which is what containerd's `%q` sends.
    fn quote(text: &str) -> String {
        let mut quoted = String::from("\"");
        for next in text.chars() {
            match next {
                '"' | '\\' => quoted.extend(['\\', next]),
                '\n' => quoted.push_str("\\n"),
                next if next.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(next))),
                next => quoted.push(next),
            }
        }
        quoted.push('"');
        quoted
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(filter in any::<String>(), grammar in r#"[a-z".=!~,/|\\x0-9 ]{0,40}"#) {
            let candidate = snapshot("a", None, &[("a", "b")]);
            for text in [filter, grammar] {
                if let Ok(filter) = Filter::parse(&[text]) {
                    filter.matches(&candidate);
                }
            }
        }

        #[test]
        fn quoted_labels_and_values_are_found(label in any::<String>(), value in any::<String>(), other in any::<String>()) {
            let filter = Filter::parse(&[format!("labels.{}=={}", quote(&label), quote(&value))]).expect("parses");
            prop_assert!(filter.matches(&snapshot("a", None, &[(&label, &value)])));
            prop_assert_eq!(filter.matches(&snapshot("a", None, &[(&label, &other)])), other == value);
        }
    }
}
