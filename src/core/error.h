// The errors that the core throws. Bindings map each to the class of the same name in
// pliant.errors.
#pragma once

#include <stdexcept>

namespace pliant {

struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ChecksumError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ModelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct EngineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct BudgetError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace pliant
