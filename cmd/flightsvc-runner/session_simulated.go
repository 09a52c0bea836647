//go:build simulated_device

// A simulated device, for tests on hosts without a GPU. Only tests build the runner with this tag.

package main

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"flightsvc/internal/control"
	"flightsvc/internal/savedmodel"
	"flightsvc/internal/tensorflow"
)

// simulated is a session on the CPU that keeps account of a device's memory. The account is in the folder that
// FAKENVML_STATE names, which the fake NVML library of package gpu reads, too:
//
//	devices      a line for each device: UUID NAME BYTES COMPUTE PARENT
//	UUID/PID     bytes that the process has on the device; they count while it lives
//
// A model takes the size of its files, or SIMULATED_MODEL_BYTES, when it is loaded, and SIMULATED_ROW_BYTES, 1 MiB by
// default, for each row of its largest run so far; it never frees them. DeviceBytes of the setup bounds both. What does
// not fit is ResourceExhausted and takes nothing.
type simulated struct {
	session
	folder   string // of the device
	capacity int64  // bytes of the device
	limit    int64  // bytes that this process may take of them; 0 is all
	model    int64
	perRow   int64

	mu   sync.Mutex // guards rows
	rows int64      // of the largest run
}

// openSession loads the SavedModel of a setup into TensorFlow, and onto the simulated device if it names one.
func openSession(setup control.Setup, options tensorflow.Options) (session, error) {
	s := &simulated{}
	if setup.Device != "" {
		if err := s.place(setup); err != nil {
			return nil, err
		}
	}
	opened, err := tensorflow.Load(setup.Dir, []string{savedmodel.ServeTag}, options)
	if err != nil {
		return nil, err
	}
	if s.session = opened; setup.Device == "" {
		return opened, nil
	}
	return s, nil
}

func (s *simulated) place(setup control.Setup) error {
	state := os.Getenv("FAKENVML_STATE")
	file, err := os.Open(filepath.Join(state, "devices"))
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		if words := strings.Fields(lines.Text()); len(words) > 2 && words[0] == setup.Device {
			if s.capacity, err = strconv.ParseInt(words[2], 10, 64); err != nil {
				return err
			}
		}
	}
	s.folder, s.limit = filepath.Join(state, setup.Device), setup.DeviceBytes
	if err := os.MkdirAll(s.folder, 0o700); err != nil {
		return err
	}
	if s.model, err = number("SIMULATED_MODEL_BYTES", -1); err != nil {
		return err
	}
	if s.perRow, err = number("SIMULATED_ROW_BYTES", 1<<20); err != nil {
		return err
	}
	if s.model < 0 {
		s.model = 0
		err = filepath.WalkDir(setup.Dir, func(_ string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			about, err := entry.Info()
			if err == nil {
				s.model += about.Size()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return s.take(s.model)
}

func number(variable string, otherwise int64) (int64, error) {
	text := os.Getenv(variable)
	if text == "" {
		return otherwise, nil
	}
	return strconv.ParseInt(text, 10, 64)
}

// take sets the bytes that this process has on the device, if the other live processes leave room for them.
func (s *simulated) take(bytes int64) error {
	folder, err := os.Open(s.folder)
	if err != nil {
		return err
	}
	defer func() { _ = folder.Close() }()
	if err := unix.Flock(int(folder.Fd()), unix.LOCK_EX); err != nil { // closing the folder releases it
		return err
	}
	entries, err := folder.ReadDir(0)
	if err != nil {
		return err
	}
	others := int64(0)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() || unix.Kill(pid, 0) == unix.ESRCH {
			continue
		}
		text, err := os.ReadFile(filepath.Join(s.folder, entry.Name()))
		if err != nil {
			continue
		}
		has, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		others += has
	}
	if others+bytes > s.capacity || s.limit > 0 && bytes > s.limit {
		return &tensorflow.Error{Code: tensorflow.ResourceExhausted,
			Message: fmt.Sprintf("OOM when allocating %d bytes on a simulated device of %d, "+
				"of which others have %d and this process may have %d", bytes, s.capacity, others, s.limit)}
	}
	fresh := filepath.Join(filepath.Dir(s.folder), fmt.Sprintf(".%d", os.Getpid()))
	if err := os.WriteFile(fresh, []byte(strconv.FormatInt(bytes, 10)), 0o600); err != nil {
		return err
	}
	return os.Rename(fresh, filepath.Join(s.folder, strconv.Itoa(os.Getpid())))
}

// Run runs the session if its rows, the largest first dimension of the feeds, fit.
func (s *simulated) Run(
	timeout time.Duration, feeds []tensorflow.Feed, fetches []string,
) ([]*tensorflow.Tensor, error) {
	rows := int64(1)
	for _, feed := range feeds {
		if shape := feed.Tensor.Shape(); len(shape) > 0 {
			rows = max(rows, shape[0])
		}
	}
	s.mu.Lock()
	if rows > s.rows {
		if err := s.take(s.model + rows*s.perRow); err != nil {
			s.mu.Unlock()
			return nil, err
		}
		s.rows = rows
	}
	s.mu.Unlock()
	return s.session.Run(timeout, feeds, fetches)
}
