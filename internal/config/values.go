package config

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Duration is a time.Duration that is text in JSON, such as "5m".
type Duration time.Duration

// UnmarshalText is part of encoding.TextUnmarshaler.
func (d *Duration) UnmarshalText(text []byte) error {
	parsed, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration; write it as 30s, 5m or 1h30m", text)
	}
	*d = Duration(parsed)
	return nil
}

// Bytes is an amount of memory. As text it has a unit: 512MiB, 2GiB, 1.5g; a plain number is bytes.
type Bytes int64

// units of Bytes. Those of Spark ("512m", "2g") are powers of 1,024, too.
var units = map[string]float64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
}

// UnmarshalText is part of encoding.TextUnmarshaler.
func (b *Bytes) UnmarshalText(text []byte) error {
	word := strings.ToLower(strings.TrimSpace(string(text)))
	at := strings.IndexFunc(word, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if at < 0 {
		at = len(word)
	}
	number, err := strconv.ParseFloat(word[:at], 64)
	unit, known := units[strings.TrimSpace(word[at:])]
	if err != nil || !known || number*unit > 1<<62 {
		return fmt.Errorf("%q is not an amount of memory; write it as 512MiB or 2GiB", text)
	}
	*b = Bytes(number * unit)
	return nil
}

// UnmarshalJSON takes a number of bytes too.
func (b *Bytes) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) != nil {
		text = string(data)
	}
	return b.UnmarshalText([]byte(text))
}

// String spells the amount for people: "1.5 GiB".
func (b Bytes) String() string { return humanize.IBytes(uint64(max(b, 0))) }
