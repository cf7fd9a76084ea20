// SPDX-License-Identifier: Apache-2.0
/// A byte-level language model on real text, trained under one pipeline or compared under four.
///   train_lm --pipeline balanced --steps 80          one run, its figures as JSON with --json FILE
///   train_lm --compare --json out.json               none, exact, balanced, smallest in fresh
///   processes
#include <fourfold/fourfold.hpp>

#include "models/corpus.hpp"
#include "models/transformer.hpp"

#include <spawn.h>
#include <sys/wait.h>
#include <torch/nn/functional/loss.h>
#include <torch/utils.h>
#include <unistd.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstdio>
#include <iostream>

namespace {

using Json = nlohmann::ordered_json;

struct Settings {
  std::string pipeline = "balanced", json, data = FOURFOLD_DEFAULT_CORPUS;
  models::TransformerOptions model;
  std::int64_t batch = 8, steps = 80, seed = 0;
  double learning_rate = 1e-3;
  bool compare = false, resident_only = false;
};

constexpr std::array kPipelines{"none", "exact", "balanced", "smallest"};
constexpr int kValidationBatches = 8;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

void show_progress(const Settings& settings, std::int64_t step, double loss) {
  if (isatty(STDERR_FILENO) == 0) return;
  constexpr int kWidth = 30;
  const auto done = static_cast<int>((step + 1) * kWidth / settings.steps);
  std::fprintf(stderr, "\r%-9s [%s%s] %3ld/%ld  loss %.4f ", settings.pipeline.c_str(),
               std::string(done, '#').c_str(), std::string(kWidth - done, '.').c_str(),
               static_cast<long>(step + 1), static_cast<long>(settings.steps), loss);
  if (step + 1 == settings.steps) std::fputc('\n', stderr);
}

template <class Pipeline>
Json train(const Settings& settings) {
  fourfold::Meter meter;  // the first line: everything is counted
  torch::manual_seed(settings.seed);
  const models::Corpus corpus(settings.data, settings.batch, settings.model.context);
  std::mt19937_64 draws(settings.seed);
  const std::int64_t resident_before = fourfold::Meter::resident_peak();

  models::Transformer model(settings.model);
  auto pipeline = Pipeline(model);
  auto optimizer = pipeline.optimizer(torch::optim::AdamWOptions(settings.learning_rate));
  const auto loss_of = [&](const auto& batch) {
    return torch::nn::functional::cross_entropy(model(batch.first).flatten(0, 1),
                                                batch.second.flatten());
  };

  std::vector<double> losses, seconds;
  for (std::int64_t step = 0; step < settings.steps; ++step) {
    const auto batch = corpus.train_batch(draws);
    const auto start = std::chrono::steady_clock::now();
    optimizer->zero_grad();
    auto loss = pipeline.forward([&] { return loss_of(batch); });
    loss.backward();
    optimizer->step();
    losses.push_back(loss.template item<double>());
    seconds.push_back(seconds_since(start));
    show_progress(settings, step, losses.back());
  }
  const auto ledger = pipeline.report();
  const std::int64_t resident_peak = fourfold::Meter::resident_peak();

  double validation = 0;
  {
    torch::NoGradGuard no_grad;
    model->eval();
    std::mt19937_64 held_out(1);
    for (int i = 0; i < kValidationBatches; ++i)
      validation += loss_of(corpus.validation_batch(held_out)).template item<double>();
  }
  return {{"pipeline", settings.pipeline},
          {"peak_bytes", ledger.bytes.peak},
          {"saved_bytes", ledger.saved_bytes},
          {"resident_peak_bytes", resident_peak},
          {"resident_before_bytes", resident_before},
          {"weight_bytes", ledger[fourfold::Place::kWeights].own_peak},
          {"gradient_bytes", ledger[fourfold::Place::kGradients].own_peak},
          {"optimizer_bytes", ledger[fourfold::Place::kOptimizer].own_peak},
          {"step_seconds", median(seconds)},
          {"first_loss", losses.front()},
          {"final_loss", losses.back()},
          {"validation_loss", validation / kValidationBatches},
          {"losses", losses}};
}

Json train_one(const Settings& settings) {
  if (settings.pipeline == "none") return train<fourfold::CompressionPipeline<>>(settings);
  if (settings.pipeline == "exact") return train<fourfold::Exact>(settings);
  if (settings.pipeline == "balanced") return train<fourfold::Balanced>(settings);
  if (settings.pipeline == "smallest") return train<fourfold::Smallest>(settings);
  TORCH_CHECK(false, "--pipeline got '", settings.pipeline,
              "'; it takes none, exact, balanced or smallest");
}

Json workload(const Settings& settings) {
  return {{"model", "byte-level causal transformer"},
          {"data", settings.data},
          {"width", settings.model.width},
          {"layers", settings.model.layers},
          {"heads", settings.model.heads},
          {"context", settings.model.context},
          {"batch", settings.batch},
          {"dropout", settings.model.dropout},
          {"steps", settings.steps},
          {"learning_rate", settings.learning_rate},
          {"seed", settings.seed},
          {"threads", torch::get_num_threads()}};
}

void write_json(const std::string& path, const Json& runs, const Settings& settings) {
  if (path.empty()) return;
  std::ofstream out(path);
  TORCH_CHECK(out, "--json ", path, " cannot be written; give a file in a folder that exists");
  out << Json{{"workload", workload(settings)}, {"runs", runs}}.dump(2) << '\n';
}

/// Runs this program again with other arguments: each pipeline gets a fresh process, so that one's
/// memory is not another's.
Json run_in_child(const std::string& program, std::vector<std::string> arguments,
                  const std::string& pipeline) {
  const auto file = std::filesystem::temp_directory_path() /
                    ("train_lm." + std::to_string(getpid()) + "." + pipeline + ".json");
  arguments.insert(arguments.end(), {"--pipeline", pipeline, "--json", file.string()});
  std::vector<char*> argv{const_cast<char*>(program.c_str())};
  for (auto& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_t child = 0;
  int status = -1;
  TORCH_CHECK(posix_spawn(&child, "/proc/self/exe", nullptr, nullptr, argv.data(), environ) == 0 &&
                  waitpid(child, &status, 0) == child && status == 0,
              "the run of pipeline '", pipeline, "' failed; run it alone to see why: ", program,
              " --pipeline ", pipeline);
  const Json run = Json::parse(std::ifstream(file))["runs"][0];
  std::filesystem::remove(file);
  return run;
}

void print_table(const Json& runs) {
  const auto mib = [](const Json& bytes) { return bytes.get<double>() / (1 << 20); };
  const auto baseline = runs[0]["peak_bytes"].get<double>();
  std::printf("\n%-9s %9s %8s %9s %9s %9s %9s %10s %7s %11s\n", "pipeline", "peak MiB", "to none",
              "saved", "weights", "gradients", "optimizer", "resident", "s/step", "validation");
  for (const Json& run : runs)
    std::printf("%-9s %9.1f %8.3f %9.1f %9.1f %9.1f %9.1f %10.1f %7.3f %11.5f\n",
                run["pipeline"].get<std::string>().c_str(), mib(run["peak_bytes"]),
                run["peak_bytes"].get<double>() / baseline, mib(run["saved_bytes"]),
                mib(run["weight_bytes"]), mib(run["gradient_bytes"]), mib(run["optimizer_bytes"]),
                mib(run["resident_peak_bytes"]), run["step_seconds"].get<double>(),
                run["validation_loss"].get<double>());
}

int run(int argc, char** argv) {
  Settings settings;
  CLI::App app{"Train a byte-level language model in a fraction of its memory"};
  app.add_option("--pipeline", settings.pipeline, "none, exact, balanced or smallest");
  app.add_flag("--compare", settings.compare,
               "run all four in fresh processes and print one table");
  app.add_option("--data", settings.data, "a text file, or a folder whose headers are the text");
  app.add_option("--json", settings.json, "where to write the figures");
  app.add_option("--steps", settings.steps)->check(CLI::PositiveNumber);
  app.add_option("--seed", settings.seed);
  app.add_option("--width", settings.model.width)->check(CLI::PositiveNumber);
  app.add_option("--layers", settings.model.layers)->check(CLI::PositiveNumber);
  app.add_option("--heads", settings.model.heads)->check(CLI::PositiveNumber);
  app.add_option("--context", settings.model.context)->check(CLI::PositiveNumber);
  app.add_option("--batch", settings.batch)->check(CLI::PositiveNumber);
  app.add_option("--dropout", settings.model.dropout)->check(CLI::Range(0.0, 0.99));
  app.add_option("--learning-rate", settings.learning_rate)->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  TORCH_CHECK(settings.model.width % settings.model.heads == 0, "--width ", settings.model.width,
              " does not divide into --heads ", settings.model.heads, "; give a multiple");

  Json runs = Json::array();
  if (!settings.compare) {
    runs.push_back(train_one(settings));
    const Json& run = runs[0];
    if (settings.json.empty()) std::cout << run.dump(2) << '\n';
  } else {
    std::vector<std::string> arguments;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--compare") continue;
      if (argument == "--json" || argument == "--pipeline")
        ++i;
      else if (argument.rfind("--json=", 0) != 0 && argument.rfind("--pipeline=", 0) != 0)
        arguments.push_back(argument);
    }
    for (const char* pipeline : kPipelines)
      runs.push_back(run_in_child(argv[0], arguments, pipeline));
    print_table(runs);
  }
  write_json(settings.json, runs, settings);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const c10::Error& error) {
    std::cerr << "train_lm: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "train_lm: " << error.what() << '\n';
  }
  return 1;
}
